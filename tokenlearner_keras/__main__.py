import sys

from tokenlearner_keras.cli import main

if __name__ == "__main__":
    sys.exit(main())
