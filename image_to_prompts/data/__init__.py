"""What stages read: tables, images, terms; and pictures of them."""
