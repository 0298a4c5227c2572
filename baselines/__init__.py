"""Methods to compare with, one file each. A file imports iasvit only and is found by its entry point."""
