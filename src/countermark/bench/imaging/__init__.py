"""Networks from images to images: tasks, data, thieves, and experiments on them."""
