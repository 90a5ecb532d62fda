"""isic_ray: safer autoregressive image generators by editing their visual-token codebook."""
