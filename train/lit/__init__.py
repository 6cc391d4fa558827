"""A LiT-like teacher: trained heads on two frozen packaged encoders."""
