from tokenlearner_keras.layers.token_fuser import TokenFuser
from tokenlearner_keras.layers.token_learner import TokenLearner

__all__ = ["TokenFuser", "TokenLearner"]
