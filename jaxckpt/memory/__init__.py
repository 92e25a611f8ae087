"""What a setting costs in bytes: GPUs by name that need not be present, compiled sizes, and what a block keeps."""
