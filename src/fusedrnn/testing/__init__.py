"""What a test of any engine needs: named workloads, tolerances."""
