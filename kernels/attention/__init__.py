"""What lies between the products of attention and feed-forward layers."""
