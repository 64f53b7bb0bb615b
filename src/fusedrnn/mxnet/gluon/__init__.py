"""The recurrent layers of MXNet's gluon."""

from fusedrnn.mxnet.gluon import rnn
from fusedrnn.mxnet.gluon.parameter import Parameter, ParameterDict

__all__ = ["Parameter", "ParameterDict", "rnn"]
