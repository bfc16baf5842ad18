"""Growth: a large model's parameters, gradients and optimizer state as linear functions of a small model's.

    Θ'_k = Σ_j w_kj · O Θ_j Iᵀ

One file for each step:

    maps.py      w, O and I: how layers and axes grow
    methods.py   named recipes: which maps, for every axis and for the layers
    operator.py  the formula on one box of one parameter
    grow.py      the formula on all shards of a model, streaming over the source
    moments.py   the same for Adam's moments, with the step sizes that fit them
    ligo.py      maps that are learned
    verify.py    what a grown model must satisfy
    offline.py   from one folder to another
"""
