"""Training-free methods: each compiles a support set into a ScoringPlan, independent of any device.

`config.Config` is a method and how it is set. `tune.tune` is the way of a fit: `folds.make_folds` leaves images out,
`out_of_fold.HeldOut` asks each model of `models/` for its logits of them, `stack_weights.fit_stack` or, for a named
method, `search.ParameterSearch` chooses by these; `fit_stack` and, for a named method, `Config.compile` add the terms
up to a plan. `out_of_fold.OutOfFold` has the logits of what was chosen, by folds that leave look-alikes
(`look_alikes.find_look_alikes`) out together: promises, sets of labels, calibration, audit and joint prediction read
them.
"""

from iosr_fast.methods.papers import METHODS, Method

__all__ = ["METHODS", "Method"]
