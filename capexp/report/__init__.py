"""What people look at: gallery, plots, attention maps, the page to try a captioner."""
