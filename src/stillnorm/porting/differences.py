"""The differences between frameworks that bite: what a port has to turn over, and why."""

from __future__ import annotations

from dataclasses import dataclass

from stillnorm.repair.report import Written
from stillnorm.reports import Block, Document, Heading, Line, Table, html

_TORCH = "https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html"
_TORCH_CODE = "torch/nn/modules/batchnorm.py"
_KERAS = "https://keras.io/api/layers/normalization_layers/batch_normalization"
_KERAS_CODE = "keras/src/layers/normalization/batch_normalization.py"
_TF1 = "https://www.tensorflow.org/versions/r1.15/api_docs/python/tf/layers/batch_normalization"
_TF1_CODE = ("tensorflow/python/layers/base.py", "tensorflow/python/keras/engine/base_layer.py")
_TF2_CODE = "tensorflow/python/keras/layers/normalization/batch_normalization.py"
_TF1_DROPOUT = "https://www.tensorflow.org/versions/r1.15/api_docs/python/tf/nn/dropout"
_FLAX = "https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/normalization.html"
_FLAX_CODE = "flax/nnx/nn/normalization.py"
_LINEN = "https://flax.readthedocs.io/en/v0.6.11/guides/batch_norm.html"


@dataclass(frozen=True)
class Difference:
    """One thing that four frameworks do differently.

    Args:
        what: The thing.
        pytorch: What `torch.nn.BatchNorm2d` does, or `torch.nn.Dropout`.
        keras: What `keras.layers.BatchNormalization` of Keras 3 does.
        tensorflow1: What `tf.layers.batch_normalization` of TensorFlow 1 does.
        flax: What `flax.nnx.BatchNorm` does.
        bites: What goes wrong when it is overlooked.
        sources: Where it is written.
    """

    what: str
    pytorch: str
    keras: str
    tensorflow1: str
    flax: str
    bites: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Differences(Written):
    """The differences that bite.

    Args:
        differences: They.
    """

    differences: tuple[Difference, ...]

    def document(self) -> Document:
        """Return them as a document."""
        blocks: list[Block] = []
        sources = list(dict.fromkeys(s for one in self.differences for s in one.sources))
        for one in self.differences:
            rows = (
                ("PyTorch", one.pytorch),
                ("Keras 3", one.keras),
                ("TensorFlow 1", one.tensorflow1),
                ("Flax", one.flax),
                ("bites", one.bites),
            )
            told = ", ".join(str(1 + sources.index(s)) for s in one.sources)
            blocks += [Heading(one.what), Table((), rows, "ll"), Line(f"sources: {told}")]
        blocks.append(Heading("Sources"))
        blocks += [Line(f"{i}  {source}") for i, source in enumerate(sources, start=1)]
        return Document("What batch norm and dropout are in four frameworks", tuple(blocks))

    def to_html(self) -> str:
        """Return them as a page."""
        return html.write(self.document())


def table() -> Differences:
    """Tell what differs between PyTorch, Keras 3, TensorFlow 1 and Flax, with sources.

    Returns:
        The differences; print them, or write them as JSON or as a page.

    Example:
        >>> print(table().differences[0].bites)
        0.99 copied into PyTorch: the statistics are those of the last batch (SN108)
    """
    return Differences(_DIFFERENCES)


_DIFFERENCES = (
    Difference(
        "What momentum weighs",
        "the new batch: r = (1 - m) r + m x",
        "the old value: r = m r + (1 - m) x",
        "the old value",
        "the old value",
        "0.99 copied into PyTorch: the statistics are those of the last batch (SN108)",
        (_TORCH, _KERAS_CODE, _TF1, _FLAX),
    ),
    Difference(
        "The default momentum",
        "0.1",
        "0.99, which is 0.01 in PyTorch",
        "0.99; 0.999 in tf.contrib.layers",
        "0.99",
        "PyTorch forgets ten times as fast: 10 batches of memory against 100",
        (_TORCH, _KERAS, _TF1, _FLAX),
    ),
    Difference(
        "The default eps",
        "1e-5",
        "1e-3",
        "1e-3",
        "1e-5",
        "a channel of variance 1e-4 comes out 3.2 times as large; eps is in no file of weights",
        (_TORCH, _KERAS, _TF1, _FLAX),
    ),
    Difference(
        "The channel axis",
        "1: (N, C, H, W)",
        "the last unless axis= says otherwise: (N, H, W, C)",
        "the last unless axis= says otherwise",
        "the last unless axis= says otherwise",
        "axis=-1 on channels-first data normalises image columns; after a flatten the features of "
        "a dense layer come in another order",
        (_TORCH, _KERAS, _TF1, _FLAX),
    ),
    Difference(
        "The variance that is kept",
        "unbiased, over n - 1; the batch is normalised by the biased one",
        "biased, over n; tf.keras 2: over n - 1 by the fused kernel, which 4-D and 5-D inputs take",
        "over n - 1 by the fused kernel, which 4-D inputs take; else over n",
        "biased, over n",
        "a factor of n / (n - 1): 2 for a batch of two values in each channel, 1.0001 for 10000; "
        "count= on weights that tf.keras 2 trained converts them twice",
        (
            _TORCH,
            _KERAS_CODE,
            _TF2_CODE,
            "https://github.com/tensorflow/tensorflow/issues/55545",
            _FLAX_CODE,
            "https://github.com/pytorch/pytorch/issues/1410",
        ),
    ),
    Difference(
        "Where the statistics live",
        "buffers of the layer, in its state_dict: running_mean, running_var",
        "weights of the layer that do not train: moving_mean, moving_variance",
        "variables that are in no collection of trainable ones",
        "BatchStat variables of the module; in linen the collection batch_stats beside params",
        "a saver of trainable variables alone, or of params alone, loses them: initial after "
        "loading (SN101)",
        (_TORCH, _KERAS_CODE, _TF1, _FLAX, _LINEN),
    ),
    Difference(
        "What updates them",
        "every forward in train mode, with or without a step of the optimizer",
        "every call with training=True while the layer is trainable",
        "operations in the collection UPDATE_OPS, which the caller must run with the train op",
        "every call in train mode; in linen the caller must ask with mutable= and keep what comes",
        "UPDATE_OPS forgotten: training looks well, the statistics stay at mean 0 and variance 1 "
        "(SN101)",
        (_TORCH_CODE, _KERAS_CODE, _TF1, _LINEN),
    ),
    Difference(
        "What decides the mode",
        "the flag `training` of the layer, set by train() and eval() on any module above it",
        "the argument training= of the call; False unless given; fit gives True",
        "the argument training=, False unless given",
        "use_running_average, set by train() and eval(), or given in the call",
        "Keras on the torch backend: train() and eval() change nothing. TensorFlow 1 without "
        "training=: trained by the initial statistics",
        (_TORCH_CODE, _KERAS, _TF1, _FLAX),
    ),
    Difference(
        "What freezes the statistics",
        "eval() on the layer after each train() above it, or `sn.freeze` once",
        "trainable=False on the layer, and compile() again",
        "training=False in the call",
        "use_running_average=True in the call; set on the module, the next train() takes it back",
        "the next model.train() thaws a layer in eval mode (SN003); in Keras "
        "model.trainable = True thaws all in it",
        (_TORCH_CODE, _KERAS, _TF1, _FLAX),
    ),
    Difference(
        "What trainable=False does",
        "requires_grad_(False): weight and bias stay, the statistics move on, and the layer "
        "still normalises by the batch",
        "inference mode, too: normalises by the moving statistics, updates none, and gamma and "
        "beta stay",
        "gamma and beta are no trainable variables, and UPDATE_OPS gets no updates of the "
        "statistics; with training=True it still normalises by the batch",
        "no such flag: the optimizer is told which parameters train",
        "Keras' way expected of PyTorch: the frozen layer still depends on the batch",
        (_TORCH_CODE, _KERAS, _TF1, *_TF1_CODE, _FLAX),
    ),
    Difference(
        "Dropout",
        "Dropout(p) drops the share p, in train mode; train() and eval() decide",
        "Dropout(rate) drops the share rate where the call has training=True",
        "tf.layers.dropout(rate=) drops it where training=True; tf.nn.dropout(keep_prob=) keeps "
        "the share keep_prob, and always does",
        "Dropout(rate) drops it unless deterministic, set by train() and eval()",
        "keep_prob=0.9 read as p=0.9: nine tenths dropped instead of one",
        (
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout.html",
            "https://keras.io/api/layers/regularization_layers/dropout",
            "https://www.tensorflow.org/versions/r1.15/api_docs/python/tf/layers/dropout",
            _TF1_DROPOUT,
            "https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/stochastic.html",
        ),
    ),
)
