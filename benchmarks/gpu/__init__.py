"""What can be said of GPU kernels where no GPU is: what they compile to, and what they do when emulated."""
