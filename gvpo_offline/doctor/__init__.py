"""What killed processes left in the folder of a dataset or a run, and its removal."""
