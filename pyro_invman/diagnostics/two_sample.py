"""Two samples, one law? The classifier two-sample test of the sbi benchmark."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pyro_invman.variables import DataError


def c2st(reference: Tensor, draws: Tensor, seed: int = 1, folds: int = 5) -> float:
    r"""Accuracy at telling `draws` from `reference`: 0.5 where the law is the same, 1 where it is another.

    A multilayer perceptron, two hidden layers of :math:`10 D` rectified units trained by Adam to
    convergence without early stopping, scored by `folds`-fold cross-validation on both samples standardised
    by mean and standard deviation of the reference. This is the classifier of the sbi benchmark; random
    forests give other, mostly kinder, figures.

    Arguments:
        reference: draws from the reference law, shape ``(S, D)``.
        draws: draws to be judged, ``(S, D)``; as many as in `reference`, or equality does not score 0.5.
        seed: of the weights and the folds.
        folds: of the cross-validation.

    Raises:
        DataError: the two differ in shape, or hold a value that is not finite.

    Example::

        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> a, b = torch.randn(2, 200, 1, generator=generator)
        >>> c2st(a, b) < 0.6 < 0.9 < c2st(a, b + 5)
        True

    References:
        Lueckmann et al., *Benchmarking simulation-based inference*, AISTATS 2021.
        Lopez-Paz & Oquab, *Revisiting classifier two-sample tests*, ICLR 2017.
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    if reference.shape != draws.shape or reference.ndim != 2:
        raise DataError(
            f"reference and draws must share one shape (S, D); found {tuple(reference.shape)} and {tuple(draws.shape)}"
        )
    for name, values in (("reference", reference), ("draws", draws)):
        bad = (~values.isfinite().all(-1)).nonzero()
        if len(bad):
            raise DataError(f"{name} must be finite; row {int(bad[0])} is {values[int(bad[0])].tolist()}")
    loc, scale = reference.float().mean(0), reference.float().std(0)
    first, second = ((values.float() - loc) / scale for values in (reference, draws))
    dimension = reference.shape[1]
    classifier = MLPClassifier(
        activation="relu",
        hidden_layer_sizes=(10 * dimension, 10 * dimension),
        max_iter=10_000,
        solver="adam",
        random_state=seed,
    )
    scores = cross_val_score(
        classifier,
        np.concatenate([first.numpy(), second.numpy()]),
        np.concatenate([np.zeros(len(first)), np.ones(len(second))]),
        cv=KFold(n_splits=folds, shuffle=True, random_state=seed),
        scoring="accuracy",
    )
    return float(np.mean(scores))
