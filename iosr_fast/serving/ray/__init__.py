"""A saved classifier on several processes or machines: replicas behind one HTTP API, by Ray Serve.

    from iosr_fast.serving.ray import Scale, deploy
    deploy("bundle", scale=Scale(replicas=4))    # on the connected Ray cluster; with another bundle: an update

`iosr-fast serve-ray` does this from the command line, `from_config` from a config file of `serve deploy`. Needs the
extras `ray` and `serve`.

Every replica has its own classifier, so this API can't change classes: a change would reach one replica only. Change
them on one classifier (in Python, or with `iosr-fast serve`), save it as a bundle and deploy it.
"""

from iosr_fast.serving.ray.deployment import Scale, build_app, from_config
from iosr_fast.serving.ray.rollout import deploy

__all__ = ["Scale", "build_app", "deploy", "from_config"]
