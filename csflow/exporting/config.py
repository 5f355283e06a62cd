"""Settings of `csflow export`."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from csflow.config import FALSE_POSITIVE_RATE, FALSE_REGIONS, JobConfig
from csflow.errors import WrongUse

Format = Literal["onnx", "openvino"]
Formats = Annotated[
    list[Format],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(min_length=1),
]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml"}


class ExportConfig(JobConfig):
    """Settings of `csflow export`."""

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    """Model directory, the --output of training or import."""
    to: Formats
    """Format of the artefact, or both. `onnx` is one file, for ONNX Runtime, OpenVINO, Triton and others;
    `openvino` is an .xml file with a .bin file beside it."""
    output: str
    """File to write. The ending of its format, .onnx or .xml, is added where it has none."""
    false_positive_rate: float = Field(FALSE_POSITIVE_RATE, gt=0, lt=1)
    """Share of normal images that may be flagged; the artefact's verdict is made with it."""
    false_regions: float = Field(FALSE_REGIONS, gt=0, le=1)
    """Number of regions (column `regions`) that a normal image may have on average."""
    int8: bool = False
    """Compute convolutions in integers of 8 bits, as far as the loss of AUROC allows. Such an artefact has
    scores, p-values and a model_id of its own. For --to openvino; needs --labels and the package nncf."""
    labels: str | None = None
    """Labelled images by which --int8 measures its loss, as the --labels of csflow evaluate: a CSV or Parquet
    file with the columns image_uri and label (0 normal, 1 defective). They should be neither training nor
    held-out images. At most 200 of each label are drawn."""
    max_loss: float = Field(0.01, ge=0, lt=1)
    """Largest loss of AUROC on these images. Where --int8 would lose more, nothing is written."""
    self_test: str | None = None
    """An image, of at most 4 MB, that travels in the artefact; wherever the artefact is loaded, it has to
    give the score that it has now. [default: a held-out image of the calibration, of middling score]"""
    runtime: str | None = None
    """Also write the runtime, csflow-edge, as one Python file to this path, such as csflow-edge.pyz."""

    @model_validator(mode="after")
    def _check_int8(self) -> "ExportConfig":
        if not self.int8:
            if self.labels is not None:
                raise WrongUse("--labels is for --int8, which measures its loss with them; give both or none")
            return self
        if self.to != ["openvino"]:
            raise WrongUse("--int8 is for OpenVINO; give --to openvino alone")
        if self.labels is None:
            raise WrongUse("--int8 needs --labels, with which its loss of AUROC is measured")
        return self

    def files(self) -> list[str]:
        """Address of the artefact in each format. Raises WrongUse if the output has another's ending."""
        written = [suffix for suffix in SUFFIXES.values() if self.output.endswith(suffix)]
        wanted = [SUFFIXES[to] for to in self.to]
        if written and written[0] not in wanted:
            raise WrongUse(f"--output {self.output} must end with {wanted[0]} for --to {self.to[0]}")
        return [self.output.removesuffix("".join(written)) + suffix for suffix in wanted]
