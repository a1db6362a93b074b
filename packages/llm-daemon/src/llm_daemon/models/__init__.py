"""What can be served: names (`catalog`), where the weights come from (one file per source), where they lie (`store`),
how they get there (`fetch`, which runs `worker` in a process of its own) and what is in them (`gguf`)."""
