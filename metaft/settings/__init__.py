"""The groups of options that commands are made of; `metaft.config` puts them together.

Every option is one field here, or in the command that alone has it. An option at None takes a value that follows from
others (data set, model, algorithm, the run), which "auto" in its help line names.

- `data`: what there is to learn from
- `meta_training`: tasks, learner, inner and outer loop, validation and test
- `finetuning`: starts, and what a fit is made of
- `compute`: how and where it is computed, and where it goes
- `settled`: what meta-training depends on, with nothing open
- `bounds`: of numbers in all of them
"""
