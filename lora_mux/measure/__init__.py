"""`lora-mux bench` and `lora-mux tune`, and what they share with the benchmarks in bench/."""
