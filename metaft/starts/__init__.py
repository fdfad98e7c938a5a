"""What training begins with: runs, published weights, files of weights, or chance; one file for each."""
