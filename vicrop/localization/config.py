"""The keys of the configuration, with types and defaults. Hydra refuses any other key, in the files under conf/ and on
the command line.
"""

from dataclasses import dataclass, field, make_dataclass
from enum import Enum

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from vicrop.heads import BINARIZE_THRESHOLD, COUNT_K, SIGMA, TOP_K
from vicrop.localization.masks import MASKS
from vicrop.tables import OPTIONS

Stage = Enum("Stage", "pipeline collect analyze visualize batch batch_analyze")
ConvMode = Enum("ConvMode", "referseg vqa")
Selection = Enum("Selection", "fixed greedy all")
ThresholdMethod = Enum("ThresholdMethod", "chord")
EntropyWeight = Enum("EntropyWeight", "area mass")
MaskMethod = Enum("MaskMethod", list(MASKS))
AttentionFormat = Enum("AttentionFormat", "npz pkl")
AttentionType = Enum("AttentionType", "float16 float32")

# Options of a model's adapter, those of tables.OPTIONS; a value for one that the adapter does not have is an error.
Look = make_dataclass("Look", [(name, option.get("type", str) | None, None) for name, option in OPTIONS.items()])


@dataclass
class Model:
    """`model=...` or `model.NAME=...`: which checkpoint looks, where it runs, and how a query stands before it."""

    family: str | None = None  # a name of tables.MODELS of the same family; None: the checkpoint's config.json tells it
    name: str = MISSING  # the checkpoint: hub id, folder, or a name of tables.MODELS
    cache_dir: str | None = None  # where weights are downloaded to
    device: str = "auto"  # auto, cpu, cuda:N
    device_id: int | None = None  # N of cuda:N, in place of `device`
    conv_mode: ConvMode = ConvMode.referseg  # only the image and the query; vqa: within the model's template
    look: Look = field(default_factory=Look)  # pyright: ignore[reportInvalidTypeForm] (a class made of OPTIONS)
    use_generate: bool = False  # read the attention of the first generated token, not of the query's last token
    max_new_tokens: int = 20
    do_sample: bool = False
    num_beams: int = 1
    use_flash_attn: bool = False


@dataclass
class Threshold:
    """`logic.threshold`: how the bound of criterion 1, the attention to the image, is found."""

    method: ThresholdMethod = ThresholdMethod.chord
    min_keep: int = 1


@dataclass
class Entropy:
    """`logic.entropy`: how criterion 2, the spatial entropy of a head's map, is computed."""

    binarize_threshold: float = BINARIZE_THRESHOLD
    weight: EntropyWeight = EntropyWeight.area  # a component counts by its number of cells; mass: by its attention


@dataclass
class Smoothing:
    """`logic.smoothing`: sigma of the Gaussian over a map, in cells; 0 smooths nothing."""

    sigma: float = SIGMA


@dataclass
class Mask:
    """`logic.mask`: which cells of the heads' map belong to the thing."""

    method: MaskMethod = MaskMethod["mean_relu"]


@dataclass
class Head:
    """An entry of `logic.manual_heads`: both numbers count from 0."""

    layer: int
    head: int


@dataclass
class Logic:
    """`logic`: which heads are chosen, and how a box and a mask are made of their maps."""

    selection: Selection = Selection.fixed
    top_k: int = TOP_K
    count_k: int = COUNT_K
    threshold: Threshold = field(default_factory=Threshold)
    entropy: Entropy = field(default_factory=Entropy)
    smoothing: Smoothing = field(default_factory=Smoothing)
    mask: Mask = field(default_factory=Mask)
    manual_heads: list[Head] | None = None
    drop_sinks: str | None = None  # a file of stage=batch_analyze: cells that heads light whatever the query is


@dataclass
class Data:
    """`data`: what is asked about which image or images, and where results go."""

    image_file: str | None = None
    query: str | None = None
    attention_file: str | None = None
    data_file: str | None = None
    process_all: bool = False
    start_index: int | None = None
    end_index: int | None = None
    output_dir: str = "outputs/localization"
    visualize_batch: bool = False
    batch_attention_dir: str | None = None
    max_image_pixels: int | None = None  # open images of up to this many pixels (at most images.MOST_PIXELS)


@dataclass
class AttentionStorage:
    """`storage.attention`: how a sample's attention is kept, for stage=batch_analyze."""

    format: AttentionFormat = AttentionFormat.npz
    compress: bool = True
    keep_meta_pickle: bool = False
    dtype: AttentionType = AttentionType.float16


@dataclass
class Storage:
    """`storage`."""

    attention: AttentionStorage = field(default_factory=AttentionStorage)


@dataclass
class Config:
    """All that localization.pipeline can be told."""

    stage: Stage = Stage.pipeline
    model: Model = field(default_factory=Model)
    logic: Logic = field(default_factory=Logic)
    data: Data = field(default_factory=Data)
    storage: Storage = field(default_factory=Storage)


ConfigStore.instance().store(name="schema", node=Config)
