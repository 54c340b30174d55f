"""Models of other packages on the fused operations; a module needs the package of its name."""
