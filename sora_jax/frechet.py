"""Frechet distance of two sets of features, each taken as a normal distribution (Heusel et al. 2017,
arXiv:1706.08500, eq. 6). With features of an I3D of Kinetics it is the Frechet video distance (Unterthiner et
al. 2018, arXiv:1812.01717).
"""

import numpy as np


def distance(a_ND, b_MD) -> float:
  """Features [N, D] and [M, D] -> |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), A and B their covariances.

  In float64. Fewer clips than D give covariances that are not of full rank: compare only distances of equal
  numbers of clips. ValueError below two clips, or where D differs.
  """
  a, b = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
  if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:] or a.ndim != 2:
    raise ValueError(
      f"frechet.distance: needs two arrays [2 or more, D] of one D; got {a.shape} and {b.shape}"
    )
  apart = a.mean(0) - b.mean(0)
  a, b = np.cov(a, rowvar=False).reshape(a.shape[1], -1), np.cov(b, rowvar=False).reshape(b.shape[1], -1)
  # tr (A B)^(1/2) = tr (R B R)^(1/2), R the root of A: of a symmetric matrix
  values, vectors = np.linalg.eigh(a)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  values = np.linalg.eigvalsh(root @ b @ root)
  shared = np.sqrt(values[values > 1e-12 * values.max()]).sum()  # the others are zeros, rounded
  return float(apart @ apart + np.trace(a) + np.trace(b) - 2 * shared)
