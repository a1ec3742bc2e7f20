"""One method, one file. Importing this package registers them all."""

from lowrank.methods import lora as lora
