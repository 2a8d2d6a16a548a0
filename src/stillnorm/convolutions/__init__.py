"""What a convolution is: one call of it, its geometry, and the algebra of scaling its channels.

A linear layer is the convolution without positions. Nothing here knows of modules.
"""

from stillnorm.convolutions.algebra import convolve as convolve
from stillnorm.convolutions.algebra import folded_bias as folded_bias
from stillnorm.convolutions.algebra import inverse_deviation as inverse_deviation
from stillnorm.convolutions.algebra import over_weight as over_weight
from stillnorm.convolutions.call import Convolution as Convolution
from stillnorm.convolutions.call import convolution_of as convolution_of
from stillnorm.convolutions.call import is_convolution as is_convolution
from stillnorm.convolutions.folded import convolve_normalized as convolve_normalized
from stillnorm.convolutions.geometry import Geometry as Geometry
