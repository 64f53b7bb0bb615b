"""The part of MXNet's gluon that is about recurrent layers."""

from fusedrnn.mxnet.gluon import rnn
from fusedrnn.mxnet.gluon.parameter import Parameter, ParameterDict

__all__ = ["Parameter", "ParameterDict", "rnn"]
