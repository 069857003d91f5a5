from .models import get_config, get_model, list_models, tell_mmpretrain

__all__ = ['get_config', 'get_model', 'list_models', 'tell_mmpretrain']
