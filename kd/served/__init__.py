"""What teachers say of rows, kept on disk."""
