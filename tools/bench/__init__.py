"""The benchmark: columns in processes of their own, physical limits, reports."""
