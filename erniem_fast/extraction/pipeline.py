"""`pipeline("information-extraction")` of transformers."""

from transformers import Pipeline

from .extractor import Extractor

OPTIONS = (
    "schema",
    "lang",
    "threshold",
    "overlap",
    "max_length",
    "split_sentence",
    "batch_tokens",
    "progress",
    "compat",
)


class InformationExtractionPipeline(Pipeline):
    """Extracts what a schema names: `Extractor` behind the interface of transformers' pipelines.

    The options of `Extractor`, `schema` among them, are given to `pipeline(…)`, or to a call for that call alone. A
    string gives its result, a list of strings a list of results. Batches are made by tokens over all texts of a call,
    so `batch_size` has no effect.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, batch_size=None, num_workers=None, **options):
        unknown = sorted(options.keys() - set(OPTIONS))
        if unknown:
            raise ValueError(f"{unknown[0]}={options[unknown[0]]!r} is not an option; there are {', '.join(OPTIONS)}.")
        return {}, options, {}

    def __call__(self, inputs, **options):
        _, options, _ = self._sanitize_parameters(**options)
        options = self._forward_params | options
        if "schema" not in options:
            raise ValueError('schema is missing; pass it to pipeline("information-extraction", …) or to the call.')
        if not isinstance(inputs, (str, dict, list, tuple)):
            inputs = list(inputs)  # a dataset or a generator
        results = Extractor(self.model, self.tokenizer, **options)(inputs)
        return results[0] if isinstance(inputs, (str, dict)) else results

    def preprocess(self, inputs, **parameters):
        raise NotImplementedError("call the pipeline: prompts follow from what was found before")

    _forward = postprocess = preprocess
