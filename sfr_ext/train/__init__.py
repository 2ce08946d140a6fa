"""Training image classifiers with and without SFR: what ``sfr-ext train`` runs (extra ``[train]``).

Nothing is imported here, so that ``import sfr_ext`` needs torch alone; :func:`sfr_ext.train.run.run` is the
entrance.
"""
