"""What a captioner is worth on a split."""
