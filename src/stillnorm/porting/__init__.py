"""Porting between PyTorch and Keras 3: weights, statistics, and what norms do with them."""

from stillnorm.porting.differences import Difference as Difference
from stillnorm.porting.differences import Differences as Differences
from stillnorm.porting.differences import table as table
from stillnorm.porting.port import compare as compare
from stillnorm.porting.port import from_keras as from_keras
from stillnorm.porting.port import read_keras as read_keras
from stillnorm.porting.port import to_keras as to_keras
from stillnorm.porting.report import Agreement as Agreement
from stillnorm.porting.report import Ported as Ported
from stillnorm.porting.report import PortReport as PortReport
from stillnorm.porting.report import Setting as Setting
from stillnorm.porting.report import StatisticsError as StatisticsError
