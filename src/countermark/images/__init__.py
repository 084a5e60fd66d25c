"""Image files and folders of images, read as hostile input."""
