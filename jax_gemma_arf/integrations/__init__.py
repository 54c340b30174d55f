"""Models of other packages on the fused operations; each module needs the package it is named for."""
