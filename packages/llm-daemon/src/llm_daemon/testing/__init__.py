"""For tests of llm-daemon and of engine adapters: a scripted fake engine, the adapters' conformance suite, a pytest plugin."""
