"""The quickstart: real and simulated media, a small Llama and a small image encoder, all built in minutes on a CPU."""
