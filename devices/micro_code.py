"""How much flash the code of TensorFlow Lite Micro takes, by operator: a range.

Measured on programs for a Cortex-M4 that register one operator each, less the one that registers none: tflite-micro
90b983c2 and CMSIS-NN 99f736a6, GCC 12.2, -Os, newlib-nano, sections collected, messages kept. Operators share code: six
of them linked together (a small convolutional network) take 59.8 kB with plain kernels and 99.7 kB with CMSIS-NN,
thirteen 82.9 and 125.6 kB, all hundred 258 kB plain. The lower end of the range counts shared code once and takes plain
kernels; the upper end counts it for each operator and takes CMSIS-NN. Other compilers and cores were not tried.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

__all__ = ["code_bytes"]

_CORE_BYTES = 28_560  # interpreter, allocator, reader, C library
_SHARED_BYTES = 5_200  # by what operators overlap, so that the lower end stays below what was linked
_LEAST_BYTES = 500
_PLAIN_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "ABS": 6_176, "ADD": 10_700, "ADD_N": 6_268, "ARG_MAX": 2_112, "ARG_MIN": 2_112, "ASSIGN_VARIABLE": 1_716,
        "AVERAGE_POOL_2D": 6_192, "BATCH_MATMUL": 11_352, "BATCH_TO_SPACE_ND": 2_532, "BROADCAST_ARGS": 1_572,
        "BROADCAST_TO": 2_672, "CALL_ONCE": 764, "CAST": 2_648, "CEIL": 1_856, "CONCATENATION": 6_144,
        "CONV_2D": 12_440, "COS": 6_016, "CUMSUM": 6_556, "DEPTHWISE_CONV_2D": 11_812, "DEPTH_TO_SPACE": 2_772,
        "DEQUANTIZE": 3_480, "DIV": 10_044, "DYNAMIC_UPDATE_SLICE": 3_548, "ELU": 3_224, "EMBEDDING_LOOKUP": 3_612,
        "EQUAL": 9_040, "EXP": 2_440, "EXPAND_DIMS": 2_188, "FILL": 2_060, "FLOOR": 1_172, "FLOOR_DIV": 5_568,
        "FLOOR_MOD": 3_328, "FULLY_CONNECTED": 10_004, "GATHER": 3_028, "GATHER_ND": 2_540, "GREATER": 9_296,
        "GREATER_EQUAL": 8_304, "HARD_SWISH": 5_112, "IF": 2_348, "L2_NORMALIZATION": 3_120, "L2_POOL_2D": 4_196,
        "LEAKY_RELU": 5_340, "LESS": 8_304, "LESS_EQUAL": 8_304, "LOG": 2_516, "LOGICAL_AND": 1_776,
        "LOGICAL_NOT": 1_840, "LOGICAL_OR": 1_776, "LOGISTIC": 8_580, "LOG_SOFTMAX": 9_184, "MAXIMUM": 5_636,
        "MAX_POOL_2D": 6_344, "MEAN": 9_036, "MINIMUM": 5_636, "MIRROR_PAD": 1_496, "MUL": 10_776, "NEG": 940,
        "NOT_EQUAL": 9_008, "PACK": 1_876, "PAD": 5_644, "PADV2": 5_644, "PRELU": 7_220, "QUANTIZE": 6_596,
        "READ_VARIABLE": 944, "REDUCE_ALL": 5_696, "REDUCE_MAX": 7_128, "REDUCE_MIN": 7_128, "RELU": 5_212,
        "RELU6": 2_804, "RESHAPE": 2_360, "RESIZE_BILINEAR": 3_628, "RESIZE_NEAREST_NEIGHBOR": 3_316,
        "REVERSE_V2": 5_284, "ROUND": 1_920, "RSQRT": 6_752, "SELECT_V2": 6_468, "SHAPE": 1_116, "SIN": 6_016,
        "SLICE": 2_860, "SOFTMAX": 10_448, "SPACE_TO_BATCH_ND": 2_628, "SPACE_TO_DEPTH": 2_840, "SPLIT": 2_156,
        "SPLIT_V": 2_444, "SQRT": 1_972, "SQUARE": 1_872, "SQUARED_DIFFERENCE": 10_084, "SQUEEZE": 1_940,
        "STRIDED_SLICE": 6_264, "SUB": 10_896, "SUM": 8_928, "SVDF": 10_976, "TANH": 8_760, "TRANSPOSE": 2_684,
        "TRANSPOSE_CONV": 11_860, "UNIDIRECTIONAL_SEQUENCE_LSTM": 18_880, "UNPACK": 1_688, "VAR_HANDLE": 940,
        "WHILE": 2_576, "ZEROS_LIKE": 1_148,
    }
)  # fmt: skip
_CMSIS_NN_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "ADD": 13_180, "AVERAGE_POOL_2D": 6_960, "BATCH_MATMUL": 13_548, "CONV_2D": 31_864,
        "DEPTHWISE_CONV_2D": 22_716, "FULLY_CONNECTED": 17_560, "MAXIMUM": 5_700, "MAX_POOL_2D": 7_184,
        "MINIMUM": 5_700, "MUL": 12_184, "PAD": 5_932, "PADV2": 5_932, "SOFTMAX": 12_280, "SVDF": 13_620,
        "TRANSPOSE": 3_288, "TRANSPOSE_CONV": 17_908, "UNIDIRECTIONAL_SEQUENCE_LSTM": 21_856,
    }
)  # fmt: skip


def code_bytes(operators: Iterable[str]) -> tuple[int, int]:
    """What the runtime takes of flash with these operators, from and to; the firmware around it comes on top.

    An operator that was not measured counts as the least and as the largest of all.

    >>> code_bytes(["CONV_2D", "FULLY_CONNECTED", "SOFTMAX"])
    (51052, 90264)
    """
    kinds = set(operators)
    largest = max(_CMSIS_NN_BYTES.values())
    low = sum(max(_LEAST_BYTES, _PLAIN_BYTES.get(kind, 0) - _SHARED_BYTES) for kind in kinds)
    high = sum(_CMSIS_NN_BYTES.get(kind, _PLAIN_BYTES.get(kind, largest)) for kind in kinds)
    return _CORE_BYTES + (_SHARED_BYTES if kinds else 0) + low, _CORE_BYTES + high
