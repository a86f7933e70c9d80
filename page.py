def mount_page(app, *a, **k):
    return app
