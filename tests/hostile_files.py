"""Files that nobody should trust: small honest models, what damage makes of them, and names of files elsewhere.

Used by test_untrusted.py and test_formats.py.
"""

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

# Conv2d(3, 4, 3), ReLU, MaxPool2d(2), Linear(16, 3) over a channel-last (1, 4, 4, 3) input, as static int8 with float
# I/O, converted by litert-torch 0.10 and quantised by ai-edge-quantizer 0.10.
TFLITE = zlib.decompress(
    base64.b64decode(
        "eNqNVm1sU1UYPv3Y1o5L12XNmKPKjBX2Y47BvkolipjIiDOZzUCEH2Vbr6Oxu5tbR5Y43WZAwYQE0B8gSPyxIJpMdAZNDG4LgSkRl0mI4Ufj"
        "FgLEZIng0uDMth7f95739p6WTb3Js3PuOe/H837ct/MyxhpfqK/0sBLmZUXMw9xMgTMHs8OewRlj/YA4oMHK2F7ApJMxG7xbAHbA5/OcKyTr"
        "B+QButTO/RGtNRRWX2vqjsZSsic453m0zwZE21sjsS7TVk2Sc1yzABGtozsGq5Xs4vlN0HfQfhXgdVXtCHXFmpqj6r5oe6ilXYMXLQb8FT0G"
        "lM0h+QJAW0QLdXZrsUibGtqvdnZF2jUG4bAOINAIUAAJeO8B7CK/RaR/nbghYp3d6i16dwM2lleUVzDzSUp3CdiPQBDPzXE+kctYMTfv8DFy"
        "iXHW0F0UwJ84u+3m+Ad3K84MaD+fu+O72rKYNROpdiUaeg5fGPlSe3l604sTz/yg5cwPjQavFPZ9erjy0GD+q6VVw9u1R+51nczqHlxTfDF4"
        "ZHOfUv3R0PDkwTfWf9u0pWdgz86iih9n3pmeGXpvfEtyw+pPLnx85gvy6yAuyO0SnWFc53v2HJ3KLlhT5Rh9dmB4auyX47cf/ezvvbP2xOod"
        "fTv6Hrx/aTcfPXXw2J26bQPBk7d/wupi/rMpX9gf4VnO5//k/I8xzk/PiT54qX57sOT5dg1qEVPD5bpvj54VV6ob0Y6LzrHH3JAoD6DIKmy3"
        "NUU01MA63gADvYA6quNFwIdYX0ApcdmdFP3qph60UM/iugIQhLhLRGkcuPpIj7FcPT/YUbni3mLo2HTGooZ4NiL5yKIzF62o+5t0b5POrRQH"
        "nlm5KWPYddLeQXbRajHlaQXlySe4ZVVR/1pS+VyVlk9rBox4jB5YCXiXP5yrlbTmkF2Pfm/695ItH+Vc0bXRb47eB4Yfi2THRj1izAXMhsE1"
        "l+7kXCqpuNLrx0juPhgKA+Jg+BzAB7gPQfYCfFbRJ6cBUYAXcBl0DgHKiMNRmjPujDll1AH5vg0ybvo+sDS4JuaFnofk+rl4DJ5br997GldV"
        "qqnIjkK9Zaf5a8YYJk7GjLSn+tGlVz6P5rWLbMl8Diyk88mTZhS+T1ye2oxryxI+MMbHBHeLm3KDdnGNL5j5QZ21ks2zV2f1GJtZer6+WxC2"
        "FKmeg3CG900Z+bi7hOwkyW7K4Gr0b/Hiwzr2RaHjl3QMeZHDQn3OFFCHMvq+CymczLhvLKbHbdRXrm3tMvXamhT8sBaNqT5n1gb0kRR2S1O8"
        "/v1BmSPxJ/07T5T5Z75e6/evf8qP/mokv8OSP09qXjArcvcmBedqSf6WJL/L5OFErteIX9n/5GdwfGvs+8Cx2JXA9DcjgfLHxwPoqyqjxww0"
        "83S+NonvNeJbKdXwuCRfb84wZx386aXv12faWfbB+1f6/wp89SAROP/rnM5xI9mzpX6nC/X/j4wJmtknJVRTi1RThaadQ/qmS/6DD94VxVtr"
        "B95Uaye8kVq0t0H6hpCHhxgt16/u1P8sdpb5v9RS3zjO3wOAfVT3OqqRl2Tgp5pnp/kT8XTSbM+TYnSafeaMgx7xKvwd9uvEfl0C9vlin6/o"
        "vxumTcqN7R/a3pH0"
    )
)
# The same layers over channel-first inputs, in float32, lowered by executorch 1.5.1 without a backend and to XNNPACK.
PTE = [
    zlib.decompress(base64.b64decode(text))
    for text in (
        (
            "eNq9Vn1sU1UUv+36tVFn2QdU2aSUqQO2iWTBMXpfpgxFYwLqMocwtrEWVu3aprRjyCAzGl1k0RHm1ySoCxqjA1GnMaX3uj/Gd9E5SVAB"
            "nQNxS/rHMicO1u15XnvbdzeriYnxJb933z33/H733HPPfe9ZEEKry+5eZqtbutQEz216FL1uijatShS/DMgI9wxo9UiHVNBKPYTWAKwc"
            "LJOiqIJWjf56HVFE2x7WNnP6kkmaXhdRVkE7fX7eLyvyNAflohxkgp6Ri2sOjOQAChlMQGgEnSZldL6SFNCdhdA0aa4jxd0DeB2wEZAX"
            "iQaua6KoYzEmAVw+LwIZVOO1OYuLa6zW+nqUk8AnLe7jtnnqfV5bVa3LvQOhdQl8s+O+9TWNVW6Xy7HMWrXd7q2rsjut9lrbNhhvScBL"
            "ifM8NocPoa4EPrPjPrUuZ4PL4fPaXU6WT0Nk5SnxHKYwbpEiCiknA4BugBtQwnLi+CM6jyRjYs+SXcvmvR1wB2AJy+NihoMcr4I9JzGu"
            "tBWLGE9CH+f7HHuWfJJZ/d3C6mE+wAxYCMiMVEe0DgzjMr+X8RVsPjXTkFAEfgbmp0O6eA1KMc2K1QDj6pgtFXAzQNrjdKannlGri1kr"
            "8fMBdZCcXEBIA/kEVABGgNQH6AI0AaoBpQAjIAzEAUA3YD+gBeAFlAJyARdhIa2ApQADYAyScxLQBWgDWAHrABaAATAGwXwH6AK8DvAC"
            "8gBDENtJtsctbI9NLO6y6/EcKr+6IYrs+CIHZ9dMyHbpapHH1FeBk8FSYoyfX6SRdHtYfpQsYUpuf4KyhrbzRvS9Io3fyebIZe0YF0dT"
            "GPxuyP0DM+IyyWPq3RNyXFJrZHGlMg4fk4HFVM3x6UTideWBT7Mi8boknYOyRsrTE/K6YnXbK48nPQzv03NyX/sB529ia1rA2jC37oaw"
            "vO6MCdn+EmfPk+1aZVjWzWbjt7G2jONfhHisXD8EfS+n8xCncyvjz2Ptfo43B3ix1243Zy/g7EFOt5PTncvGjbH95/hOjq8Py/b3OHuk"
            "dqAf4avT4PynR954UV9V5DwbmD7bUxUCLaSQzzJSKJNU3NlWMjTLc6p/nExcHw+H5fr4J60gp7V4KnGt+iej+5lIJ4aMSW7/p7j9n+T2"
            "f0rOL3sPRr4ZsauC0xgQRbGO649AvxH67PcBYlBF5m3l9Ddz+jN+M1A3p1UgyvEFOfv9nP0Kp+vndJPZeEps/6dk/vMcP4ezH+DsFtmu"
            "TRNlXQ0b13L5qBPZepUayJcq4jPt/ceN62eMHxTl2jNGqln68s6K116immme+uf6i0EHq09m367YHGmRnZxe3xl8fWs0ke++BiXWT+L0"
            "q0W5JitYjiQ3vVw3GgX3/ZO47RynFZ6TEnD492QSswc5Xq8YP79/O1d0/VImufUD1zAty9F/V0UCLX7dKhZHDDr2b6Rj3/9SwArAhrvz"
            "TDvN3h1um7nY5PQ5HHkmM/xheW2NXs5QZ3dYPTZn1Ta3rRbMGyp3VQJ3aibfvNlnd3jtzm0FXp/bYTNP0zJLYuZEav8Z/9/Evyth3PCb"
            "6p0x7YZK899JVEbP1BaXZ3uNx4r+72vPDwH/Mee3uGyZmV7QzqbBs6+R3prHcPmVHUfDJVnC+aE9Aeer6/CiYifZP3orCZda6JVnlTRp"
            "Ryf5vGN4ZfI3b+JLu0J48A01HXznQ1KR+zI+dnChkF9sJqmN6YI5eyqwqv89y6h7mdDZt5yG5o+TmrYHSEvnG+SF0sXChUaR3Ov6jOQe"
            "TqaL9hbRybSrxL5lkZD100c4S/sl7vj2dott9mmyolKNX0ZFtNCWSjuWniEFh8Zx7dxfcVnwMAm/ePno8vQwfn94lWCq348zJ85ZzixQ"
            "Cf7ZQ2TschoePGWko6/o6FDHGVJY/gn++JkDeGT7MDme48Q/b/oOXwsfD5w/MbLy0LvLceuzY9izAguHL82lLe428uTVDqxas1B4d9cS"
            "oX0wX/h+IAsv2LSEDmn3Wkz7rpGe9++h8413CQPnM4VQeynV70nH4dMqUviFgpQ/1U3ce1/DomeYnG1qw+2PnMAN6TcJlVX78KlZq6j+"
            "kEieD/biz8I5+Hf/LfTYb4OkwbpC+PGUSnjrhw/J27b7SbF/Jd35yeajrVsz6AdKI80M5AfmfR6yrLW/Qzb9NIyLTs2jdQ/WCX2uuwTr"
            "z4/Tlgu7SXN/kcW4NRP3XfLgjaGTeGC9zxL85jo5t3oUl+/10bePzqWWJc0ktOU62Zj9KfH3P0JR/3oyPvgEbjh+By0pfDSA7rtHGGnp"
            "DzR3XV7Zc+hIwIDX4urjZsG/2yNo9pmFXv02oTq7PbBl3EZL/KPkq7UFAnrqnP9i0xRR5pdS1O6iIUMFdXevJeVWveDdmiIof2mgBUfm"
            "Cy8+uoaO7KwgWR1fkxHLamJIfZD4v7DRPwExNndX"
        ),
        (
            "eNq9Vm9sFMcVn/vr83G1DtsUtznC5eJW5m/27vZ29+Bm5YJpST+UJEWuUzBhd28Xu7jnk7EJiJC6TdRaASkQ3KRxUZqgpoqaQF1KInTc"
            "bK0KSAhO6jhI0FAaYmhqS/5guTRy1IuvM7dzvrHjfqigmdO7nX373u+9efPmvUkAADZsDkf0Fo4L4nm/C1jDbT18C6xnNQjg/xr89AMf"
            "8OC5E88JB4A9NgB6MNXZS+Qkuph3Cj+3Aus9mMvnXXRej8mQOEOPxKNRg5MkkUuGeU3lI1xci+iKqvCSqsV40eANXk9qQkxSuLDI60Iy"
            "JkQFIxkNa8SvTozpZDAlwRBiuh6N8HosKilRMZyMiEKUixsCrybVcEyQ4qIUlzSBE8OaGAsnpaQqGqqqakJYj4gE8y2M6WAwwzFDiaqC"
            "FlOifFzSxZgocbwmaAIfTUpqVOG5mI79U7G6lMTuC+FkWIzzSkxVJT0SUwhm4LN83s5g6lFDj4taLC4ImhgNK5FIXFMjhhhWjbAejUm8"
            "oWkKp2uRuKIaUSXCiZogqorAqXEhGtViBHP7tLV2GygNsm1HMT1JvmNKkLhTu6fz+byvKLigpDOE+QPFF2+JP4r5fjrvLi/xPXjXfRiR"
            "ZEE/Nd5dxn73FyyS70GG7yz8SoOoBgqzL4M6UIv9DDAZ5sRcgLl4TzGlKQ1huoTpCqZfYICbOKh2BtNvm41P7Jl03b5CHlujH/OoqK0C"
            "/zWlUmlF27kOk55KlvT9NChFn7wUp56Sjb578P8CumYaM7uHnhMP9cPO+MX6aGN4drpvTuojOV/AVYn9ripY8tBIVlI7NTMxBO5uuo+2"
            "oi2b9STvjoKPXlBO/SniVoKFn8OtZnHd7sK63Uw8gc3ucDK4xfPnoTHyFOYANGCKY9oSXhncF+rcm9ZDa4Kprra2lcGQ1p7q1Pd0MoyW"
            "1rZkh556ZFda1zB7S/P+Zqw7PVc/pHa1tnW2pnat7uxKt+mhWVghAhaaD+2O6f8v/u+f1+9kq9Y5x+yW5tB/g8BBIEfIaO94VOlIgv/H"
            "aNrIcXcXqsSUe/aJtWpH03e4MDmjwcLe+nDeVVv5gzOEnNFBrDWAE2CU5tsV/By0WTnhojWi3mad2xaaK+twrpI8y9NRrEt3qi8cm4M/"
            "wODffo/w4vWTKmfVA9aOn7Fz+33DiyNcslPD2Olnisid6SfemRrgLZ5zpkZ5mRpFWsdBvNG83drro5haMK3ENIG/ZWn/eYDi5HDvI+pW"
            "zlTiNbkLeQRoJlVSK3Za04r1ywtm168JikMwn5kmc9tMjXbS2JQz8sHpkvyfqHzRhoPKe6gNB+VvZnReYHR8VL6M8YnIP8nIv0vlnYy8"
            "m/pmY3oAoSyj585/Xs/F6BV1yPstRu/Z/OwY2Kkua682X5JPzWPHMcc/J9N75tszP+0OxT1zMntG8OwMhoMhD6jAdcxDc6yEW8PkAjlJ"
            "LG7RR9s8Pjpov2Exq2lGFRHJm5/B8zAYc3sX2aezmBmgd1bSg1fSb9usmNs9tJ69RvOAvJfTPP2JJVNd7PVDNBY+ij03b05a8i6rdhC5"
            "6pnq6qMYPmrPzZxHB9vfseXKQgR8xWtbRR2VAeBuUMfcvEp1O4DreC3+WsorO+NbMS4uWleIX2WMX2QpG2fde7wzdxx8C/wRAMvBt+ex"
            "V4ejyQG+ICXhW2k9vh0sn3P/sTH5Mh/fybzbmTyw7mez4sDE1U+9883Elc0DwJz/IjYHvrhx4INsJvXsA3DkeZd5LvU+XLYmhUZeehVt"
            "joTMo5NfRU11T8OrZQvNXEPCPPfre+XBd55DN5+wm6vWhNBZ5bvQsfcYqthTJTfe3Hvmjb6xtaEl09lcfUAuf++XcP3wbxKXRw9kr+0f"
            "h5PpiHxsSDA/q/wY9XEX0fjSKdRqLJNXH5+CyqFvocCHv4Pa4n/AnmPPo0DZH+HmwRPoZw3L5b73v5bIPXXjzNU9eaQvfBsJVTn4jfbX"
            "UbzZBV8ZWy/XnSg3nwaSGfzhUbjssGTyeoW56N+XEhfvccrna1PwBx/3wczCUfTRtivQufFe+daNSvhJ7nz25f0r5JELNeblNyfW9o6s"
            "kid/7jGPvyzAv1wPwNG+i+jgE7fgPdtWmHzjSdgRh/Jo2eHE73/8AjxxbbEZPPIJmnh0DPWkD6GBV0Rzac198juPHYLn/jmCrl9eJPc+"
            "+CbcnYzL470N5u6qL8l/u+CUfQeqYPMjR+CvPngV5d52ogsL1psv6t9E/Gkb8h3PozWZtWbjzlPop4Nn4b6T6pn04efg67laeHBHtZnv"
            "GEP/ynzF/K29xrzT+78ouyp71xvjiU2tL6FtH45B8AUP6cJdZsv9LfJQ+31y8qPvmT1XH0fdw1KiZsciOHStA24dfwtef7grMfjep+jS"
            "hknYeLjLfPHMYjOxohuNG5+irUv+gDLDD5pg+GE0NfJ9uPv81816/qEsWCfKEz3D2e7XbqwdON6f9cNNcPv5kJx5vEN2HwnJZ3275O1L"
            "erPGlG7WZybRu5tWy2DnpcxfH5tG9lUNJuhtN8f9TWb61CbUmPTJnTu8sv3vu83V/Uvlpx7aaE7sa0KBvj+j213/RGID8lfcjzKndfM/"
            "B+BDCQ=="
        ),
    )
]
SHAPE = (1, 3, 4, 4)
WEIGHTS = np.random.default_rng(1).normal(size=(48, 3)).astype(np.float32)


# Honest seeds.


def onnx_linear(*, weights: TensorProto | None = None, free: str | None = None) -> ModelProto:
    """Flatten, MatMul: a linear model on inputs of SHAPE; `free` names a third dimension that is not fixed."""
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    return onnx_of(nodes, [weights or numpy_helper.from_array(WEIGHTS, "w")], free=free)


def onnx_of(nodes: list[NodeProto], tensors: list[TensorProto], *, free: str | None = None) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, free or 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def branch(tensor: TensorProto, name: str = "then") -> GraphProto:
    """The body of an If whose weights stand in it."""
    node = helper.make_node("MatMul", ["f", tensor.name], [f"{name}_y"])
    output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
    return helper.make_graph([node], name, [], [output], [tensor])


def onnx_branching(tensor: TensorProto | None = None) -> ModelProto:
    """The same linear model inside both branches of an If, with the condition a Constant."""
    honest = numpy_helper.from_array(WEIGHTS, "w_else")
    then = branch(tensor or numpy_helper.from_array(WEIGHTS, "w_then"))
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True), "c")),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=branch(honest, "other")),
    ]
    return onnx_of(nodes, [])


def onnx_quantised() -> ModelProto:
    """A convolution between quantise and dequantise nodes, a global mean, a linear layer."""
    rng = np.random.default_rng(2)
    arrays = {
        "scale": np.float32(0.05),
        "zero": np.int8(3),
        "kernel": rng.integers(-127, 127, (5, 3, 3, 3)).astype(np.int8),
        "kernel_scale": np.float32(0.01),
        "kernel_zero": np.int8(0),
        "w": rng.normal(size=(5, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["kernel", "kernel_scale", "kernel_zero"], ["kd"]),
        helper.make_node("Conv", ["xd", "kd"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["h"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    return onnx_of(nodes, [numpy_helper.from_array(value, name) for name, value in arrays.items()])


def safetensors(
    tensors: Mapping[str, np.ndarray] | None = None, *, header: bytes | None = None, data: bytes | None = None
) -> bytes:
    """A safetensors file by the specification alone; parts can be replaced by hostile ones."""
    names = {"F32": np.float32, "I64": np.int64, "BOOL": np.bool_, "F16": np.float16, "U8": np.uint8}
    given = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.int64([1, 2])} if tensors is None else tensors
    listed, body = {}, b""
    for name, value in given.items():
        dtype = next(label for label, kind in names.items() if value.dtype == kind)
        listed[name] = {
            "dtype": dtype,
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + value.nbytes],
        }
        body += value.tobytes()
    text = json.dumps({"__metadata__": {"order": "[]"}, **listed}).encode() if header is None else header
    return len(text).to_bytes(8, "little") + text + (body if data is None else data)


# Damage.

Mutate = Callable[[np.random.Generator, bytes], bytes]


def flip_bits(rng: np.random.Generator, content: bytes) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(0, len(changed), rng.integers(1, 9)):
        changed[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def replace_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(0, len(changed), 4):
        changed[place] = int(rng.integers(0, 256))
    return bytes(changed)


def truncate(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: int(rng.integers(0, len(content)))]


def splice(rng: np.random.Generator, content: bytes) -> bytes:
    """Copy a stretch of the file to another place: over what is there, or in between."""
    length, source, target = (int(value) for value in rng.integers(0, len(content), 3))
    length = 1 + length % 64
    stretch = content[source : source + length]
    skipped = len(stretch) if rng.integers(0, 2) else 0
    return content[:target] + stretch + content[target + skipped :]


def cut_out(rng: np.random.Generator, content: bytes) -> bytes:
    place, length = int(rng.integers(0, len(content))), int(rng.integers(1, 17))
    return content[:place] + content[place + length :]


def lie_about_length(rng: np.random.Generator, content: bytes) -> bytes:
    """Put an extreme 32- or 64-bit number, or an extreme protobuf varint, where a length or an offset may stand."""
    numbers = [0, 1, 4, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 4, 2**32 - 1, len(content), max(0, len(content) - 4)]
    number = numbers[int(rng.integers(0, len(numbers)))]
    varints = [b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x07", b"\x80" * 9 + b"\x01", b"\0"]
    lies = [number.to_bytes(4, "little"), number.to_bytes(8, "little"), varints[int(rng.integers(0, len(varints)))]]
    lie = lies[int(rng.integers(0, 3))]
    place = int(rng.integers(0, max(1, len(content) - len(lie))))
    place -= place % 4 if rng.integers(0, 2) else 0
    return content[:place] + lie + content[place + len(lie) :]


MUTATIONS: tuple[Mutate, ...] = (flip_bits, replace_bytes, truncate, splice, cut_out, lie_about_length)


def mutations(seeds: list[bytes], count: int, *, seed: int = 0) -> list[bytes]:
    """So many different damaged files, each made of one of the seeds by one kind of damage or two."""
    rng = np.random.default_rng(seed)
    made: dict[bytes, None] = {}
    while len(made) < count:
        number = len(made)
        changed = MUTATIONS[number % len(MUTATIONS)](rng, seeds[number // len(MUTATIONS) % len(seeds)])
        if changed and rng.integers(0, 4) == 0:
            changed = MUTATIONS[int(rng.integers(0, len(MUTATIONS)))](rng, changed)
        if changed not in seeds:
            made[changed] = None
    return list(made)


# LiteRT 2.3 faults on a quantised tensor whose scale is zero. The structure that we read is whole.
CRASHING_TFLITE = TFLITE[:1392] + bytes(4) + TFLITE[1396:]


# Names of files elsewhere.


def external(*entries: tuple[str, str]) -> TensorProto:
    """The weights of the linear model, said to lie in another file."""
    tensor = TensorProto(name="w", dims=WEIGHTS.shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)
    return tensor


def in_initializer(tensor: TensorProto) -> ModelProto:
    return onnx_linear(weights=tensor)


def in_constant(tensor: TensorProto) -> ModelProto:
    model = onnx_of([], [])
    constant = helper.make_node("Constant", [], ["w"])
    constant.attribute.add(name="value", type=AttributeProto.TENSOR, t=tensor)
    model.graph.node.extend([constant, *onnx_linear().graph.node])
    return model


def in_tensors(tensor: TensorProto) -> ModelProto:
    model = onnx_linear()
    model.graph.node[0].attribute.add(name="more", type=AttributeProto.TENSORS, tensors=[tensor])
    return model


def _sparse(tensor: TensorProto, *, indices: bool = False) -> onnx.SparseTensorProto:
    honest = numpy_helper.from_array(np.arange(len(WEIGHTS)), "i")
    values, places = (numpy_helper.from_array(WEIGHTS, "v"), tensor) if indices else (tensor, honest)
    return onnx.SparseTensorProto(values=values, indices=places, dims=WEIGHTS.shape)


def in_sparse_initializer(tensor: TensorProto) -> ModelProto:
    model = onnx_linear()
    model.graph.sparse_initializer.append(_sparse(tensor))
    return model


def in_sparse_indices(tensor: TensorProto) -> ModelProto:
    model = onnx_linear()
    model.graph.sparse_initializer.append(_sparse(tensor, indices=True))
    return model


def in_sparse_attribute(tensor: TensorProto) -> ModelProto:
    model = onnx_linear()
    model.graph.node[0].attribute.add(name="s", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=_sparse(tensor))
    return model


def in_sparse_attributes(tensor: TensorProto) -> ModelProto:
    model = onnx_linear()
    model.graph.node[0].attribute.add(name="s", type=AttributeProto.SPARSE_TENSORS, sparse_tensors=[_sparse(tensor)])
    return model


def in_branch(tensor: TensorProto) -> ModelProto:
    return onnx_branching(tensor)


def in_nested_branch(tensor: TensorProto) -> ModelProto:
    model = onnx_branching()
    outer = model.graph.node[2].attribute[0].g
    outer.node[0].CopyFrom(onnx_branching(tensor).graph.node[2])
    outer.node[0].output[0] = outer.output[0].name
    return model


def in_graphs(tensor: TensorProto) -> ModelProto:
    model = onnx_linear()
    model.graph.node[0].attribute.add(name="g", type=AttributeProto.GRAPHS, graphs=[branch(tensor)])
    return model


def in_loop(tensor: TensorProto) -> ModelProto:
    model = onnx_linear()
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["z"], body=branch(tensor, "body")))
    return model


def in_function(tensor: TensorProto) -> ModelProto:
    model = onnx_linear()
    node = in_constant(tensor).graph.node[0]
    model.functions.append(helper.make_function("ours", "F", [], ["w"], [node], [helper.make_opsetid("", 20)]))
    return model


def in_function_default(tensor: TensorProto) -> ModelProto:
    model = in_function(numpy_helper.from_array(WEIGHTS, "w"))
    model.functions[0].attribute_proto.add(name="value", type=AttributeProto.TENSOR, t=tensor)
    return model


def in_training(tensor: TensorProto) -> ModelProto:
    model = onnx_linear()
    model.training_info.add().initialization.CopyFrom(branch(tensor))
    return model


def in_algorithm(tensor: TensorProto) -> ModelProto:
    model = onnx_linear()
    model.training_info.add().algorithm.CopyFrom(branch(tensor))
    return model


PLACES: tuple[Callable[[TensorProto], ModelProto], ...] = (
    in_initializer,
    in_constant,
    in_tensors,
    in_sparse_initializer,
    in_sparse_indices,
    in_sparse_attribute,
    in_sparse_attributes,
    in_branch,
    in_nested_branch,
    in_graphs,
    in_loop,
    in_function,
    in_function_default,
    in_training,
    in_algorithm,
)


def as_ort(model: ModelProto) -> bytes:
    """The same model in ONNX Runtime's own format."""
    import tempfile

    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.save_model_format", "ORT")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "m.ort"))
        InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return Path(folder, "m.ort").read_bytes()
