"""Cost: latency, memory and distance to the hardware's ceiling, dense against compressed."""
