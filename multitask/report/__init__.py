"""Reports as HTML files that stand alone, and the plots in them."""
