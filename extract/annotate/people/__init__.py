"""What people say about annotations, and what filters find before them."""
