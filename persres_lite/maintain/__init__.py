"""Commands that keep the project itself in order; the package never imports them."""
