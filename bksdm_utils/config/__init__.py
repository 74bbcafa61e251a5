"""The parameters of every notebook and command, one typed class each."""
