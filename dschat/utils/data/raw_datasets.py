"""DeepSpeed-Chat's classes of data sets: functions of a row now, in dschat.data.named_readers."""

from dschat.utils.predecessor import moved as _moved

_SETS = (
    *("AnthropichhrlhfDataset", "BelleOpenSoochatDataset", "CohereMiracljaqueries2212Dataset"),
    *("CohereMiraclzhqueries2212Dataset", "DahoasFullhhrlhfDataset", "DahoasRmstaticDataset"),
    *("DahoasSyntheticinstructgptjpairwiseDataset", "HelloSimpleAIHC3ChineseDataset"),
    *("LmqgQgjaquadDataset", "LmqgQgkoquadDataset", "LocalJsonFileDataset", "MkqaChineseDataset"),
    *(
        "MkqaJapaneseDataset",
        "OpenaiWebgptcomparisonsDataset",
        "PvduySharegptalpacaoavicunaformatDataset",
    ),
    *("StanfordnlpSHPDataset", "Wangrui6ZhihuKOLDataset", "YitingxieRlhfrewarddatasetsDataset"),
)
_READER = "a reader of rows (dschat.data.readers); for your own set, --dataset_function module:name"
__getattr__ = _moved(__name__, dict.fromkeys(("PromptRawDataset", *_SETS), _READER))
