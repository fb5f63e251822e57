"""Tasks that share one manifold, each with a latent of its own."""
