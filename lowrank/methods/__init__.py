"""One method, one file. Importing this package registers them all."""

from lowrank.methods import adalora as adalora
from lowrank.methods import bottleneck as bottleneck
from lowrank.methods import dora as dora
from lowrank.methods import full as full
from lowrank.methods import ia3 as ia3
from lowrank.methods import loftq as loftq
from lowrank.methods import loha as loha
from lowrank.methods import lokr as lokr
from lowrank.methods import lora as lora
from lowrank.methods import oft as oft
from lowrank.methods import olora as olora
from lowrank.methods import p_tuning as p_tuning
from lowrank.methods import pissa as pissa
from lowrank.methods import prefix as prefix
from lowrank.methods import prompt as prompt
from lowrank.methods import vera as vera
