"""The command `iosr-fast build-plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from iosr_fast.cli import options as shared
from iosr_fast.cli.command import note
from iosr_fast.cli.options import Runtime, argument, option
from iosr_fast.sealed.folders import check_new_folder


def build_plan(
    classifier: Annotated[Path, argument("CLASSIFIER", "A saved classifier.")],
    out: Annotated[Path, option("Folder to write. A plan that is there is replaced.")],
    runtime: Runtime = "auto",
    max_batch: Annotated[int | None, option("Images of one run at most [default: by the processor].")] = None,
    max_error: shared.PromisedError = None,
    reject_unknown: shared.RejectUnknown = False,
) -> None:
    """Compile a saved classifier, encoder and head in one TensorRT plan, for programs of TensorRT or Triton Inference
    Server: uint8 images of the encoder's size in, probabilities and labels out.

    \b
    iosr-fast build-plan my-classifier --runtime tensorrt --out plan
    """
    from iosr_fast.delivery.one_plan import PLAN_KIND, plan_runtime, write_plan
    from iosr_fast.encoders.engine_folder import Target
    from iosr_fast.head.verdict import Abstention
    from iosr_fast.methods.unknown import KEEP
    from iosr_fast.store.bundle import load

    check_new_folder(out, PLAN_KIND)
    runtime = plan_runtime(runtime)
    abstention = Abstention.of("reject" if reject_unknown else None, None, KEEP, max_error)
    fit = load(classifier).open("auto", None, 1)
    manifest = write_plan(fit, out, runtime, max_batch, abstention)
    ran = "so does the plan, on the GPU here" if manifest["was_run"] else "the plan was not run: no GPU for it here"
    note(
        f"{len(manifest['class_names'])} classes: pixels to {', '.join(manifest['outputs'])}",
        f"  the graph in ONNX Runtime answers as the classifier; {ran}",
        f"built for batches of up to {manifest['max_batch']}:",
        *(f"  {out / name}  {entry['bytes'] / 1e6:.1f} MB" for name, entry in manifest["files"].items()),
        f"  {out / 'manifest.json'}, for {Target(**manifest['target'])}",
        err=False,
    )
